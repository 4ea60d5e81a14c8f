"""The packaging file: packages, dependencies, extras, the console script. Tool settings are in pyproject.toml.

Install with `pip install -c constraints.txt -e '.[dev]'`; the Makefile does. The ranges here say what the code can live with,
constraints.txt says what it is tested with.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "fusiontrain" / "__init__.py").read_text()).group(1)  # type: ignore[union-attr]

REQUIRED = [
    "torch>=2.11,<2.14",
    "transformers>=5.0",
    "tokenizers",
    "safetensors",
    "webdataset>=1.0",
    "numpy>=1.26",
    "pillow>=10.0",
    "pydantic>=2.8",
    "omegaconf>=2.3",
    "pyyaml",
    "rich",
    "tensorboard>=2.16",
]

VAE = ["diffusers>=0.30"]

EXTRAS = {
    "gpu": ["flash-attn>=2.7"],  # Triton comes with a CUDA build of torch
    "deepspeed": ["deepspeed>=0.17"],
    "s3": ["boto3"],
    "vae": VAE,
    "dev": [*VAE, "hypothesis", "import-linter", "mypy", "pytest", "ruff", "types-PyYAML"],
}

setup(
    name="fusiontrain",
    version=VERSION,
    description="Distributed pretraining for models that read and write text and images in one sequence",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # `kernels` itself must stay out of the import path: a package of that name belongs to Hugging Face, and transformers imports it.
    packages=[
        *find_packages(include=["fusiontrain", "fusiontrain.*"]),
        *find_packages("kernels", include=["fusiontrain_kernels", "fusiontrain_kernels.*"]),
    ],
    package_dir={"fusiontrain_kernels": "kernels/fusiontrain_kernels"},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fusiontrain = fusiontrain.cli.main:main"]},
)
