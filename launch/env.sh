# Settings for every launcher, each with its reason. Source it; what is already set wins.

# torchrun's agents otherwise share one store across restarts, gloo reads stale addresses from it, and restarts fail (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
# glibc gives large blocks back to the system at every free, and taking them again costs page faults: on a CPU a tenth of a training step.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"
# Threads that wait should sleep: spinning ones take the cores from the other ranks of a machine.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# A fork after the tokenizers' threads started would print a warning per worker; the loader's threads are enough.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# A signal ends a run after the current step and a checkpoint; torchrun would kill it after 30 seconds, and large checkpoints take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
