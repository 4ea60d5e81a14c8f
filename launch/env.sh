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
# NCCL is silent by default; one line for what goes wrong tells a broken link from a rank that is late.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The last collectives of every rank, kept in memory and written out when one times out: they name the rank that is missing.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# Batches differ in size, and blocks of fixed size would leave holes in a GPU's memory.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# gloo takes the interface that the host's name resolves to, often the loopback, and NCCL the first one that it finds: between nodes both must
# take the one with the node's address (`=` is NCCL's sign for exactly this name).
if [ -n "${LOCAL_ADDR:-}" ] && command -v ip >/dev/null && command -v getent >/dev/null; then
  address="$(getent ahostsv4 "$LOCAL_ADDR" | awk 'NR == 1 { print $1 }' || true)"
  interface="$(ip -o -4 address show to "${address:-none}" 2>/dev/null | awk 'NR == 1 { print $2 }' || true)"
  if [ -n "$interface" ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$interface}"
  fi
fi
