"""What is said about bad samples: every one is counted, not every one is named, and too many end the run."""

from __future__ import annotations

import re

import pytest

from fusiontrain.data.errors import NAMED_IN_FULL, REASONS, BadSample, BadSampleLog
from fusiontrain.types import SourceRef
from fusiontrain.utils.errors import UserError


def ref(number: int, source: str = "a") -> SourceRef:
    return SourceRef(source, f"{source}/x.tar", number, f"key-{number}")


def test_bad_samples_are_counted_by_source_and_reason():
    log = BadSampleLog(1.0)
    for number, reason in enumerate(REASONS):
        for _ in range(number + 1):
            log.add(ref(number), BadSample("no", reason))
    log.add(ref(0, "b"), "what the index wrote down")
    assert log.counts == {**{("a", reason): number + 1 for number, reason in enumerate(REASONS)}, ("b", "format"): 1}
    assert log.bad == log.tried == 16


def test_a_reason_that_repeats_is_named_ever_more_rarely_and_hides_no_other(caplog):
    log = BadSampleLog(1.0)
    for number in range(1000):
        log.add(ref(number), BadSample("no", "decode"))
    log.add(ref(0), BadSample("gone", "read"))
    named = [record.args[0].index for record in caplog.records[:-1]]
    assert named == [*range(NAMED_IN_FULL), 15, 31, 63, 127, 255, 511]
    assert "gone" in caplog.records[-1].getMessage()
    assert "(512 so far" in caplog.records[-2].getMessage()
    assert log.bad == 1001


def test_the_sentence_that_ends_a_run_says_how_many_for_which_reason():
    log = BadSampleLog(0.5)
    log.good(3)
    for number in range(7):
        log.add(ref(number), BadSample("no", "decode"))
    log.add(ref(7), BadSample("no", "changed"))
    log.add(ref(8), BadSample("no", "decode"))
    with pytest.raises(UserError, match=r"^10 of 13 samples are unreadable \(9 decode, 1 changed\), the last being a/x\.tar: sample 9"):
        log.add(ref(9), BadSample("no", "decode"))


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("its .vq.npy has codes from 8 to 63, data.image.codebook_size=16 allows 0 to 15", "correct that setting, or mend the shards"),
        ("its 0.jpg does not decode", "mend the shards or raise data.max_bad_fraction"),
    ],
)
def test_where_a_setting_may_be_wrong_the_sentence_says_so(reason, remedy):
    log = BadSampleLog(0.0)
    with pytest.raises(UserError, match=rf"{re.escape(reason)}; {remedy}$"):
        log.add(ref(0), BadSample(reason))


def test_findings_wait_for_their_step_and_are_taken_once():
    log = BadSampleLog(1.0)
    log.add(ref(1), BadSample("no", "decode"), step=3, offset=512)
    log.add(ref(2), BadSample("no", "read"), step=2)
    assert log.take(1) == []
    assert [finding["sample"] for finding in log.take(2)] == [2]
    assert log.take(9) == [{"step": 3, "source": "a", "shard": "a/x.tar", "sample": 1, "key": "key-1", "offset": 512, "reason": "decode", "message": "no"}]
    assert log.take(9) == []
