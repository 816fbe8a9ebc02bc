#!/bin/bash
# All that needs a GPU, in one go and without a package index; `make gpu-check` and docs/gpu.md.
#
#     jobs/gpu_check.sh OUT [SECONDS [STEPS]]
#
# OUT gets table.txt (a line per step), machine.txt and results.tgz (whole logs, samples, runs);
# SECONDS, 330, is the time for all steps. Steps are in the order in which they would be missed, each
# has a limit of its own, and none stops the others: what no longer fits is skipped. A step's exit
# code is in the table; the script's own is 1 if a step that must pass has failed. STEPS, as in
# 'B2|A3', is a pattern of the names of those to run: to repeat some, or to run what was skipped.
#
# Packages that are missing come from .carry/ (`make gpu-carry`, on a machine with an index).
out=${1:?usage: jobs/gpu_check.sh OUT [SECONDS [STEPS]]}
budget=${2:-330}
steps=${3:-.}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
begun=$SECONDS
table=$out/table.txt
python=${PYTHON:-python3}
site=/tmp/mpi_dasgd_site
raw=$(mktemp -d)
failed=0
: >"$table"
trap 'tar czf "$out/results.tgz" -C "$raw" . ; echo "total $((SECONDS - begun)) s" | tee -a "$table"' EXIT

# step NAME LIMIT COMMAND...: must pass.   may NAME LIMIT COMMAND...: either way is a result.
step() {
    may "$@"
    [ "$rc" = 0 ] || [ "$rc" = skipped ] || failed=1
}
may() {
    local name=$1 limit=$2 started=$SECONDS line
    shift 2
    rc=skipped
    [[ $name =~ $steps ]] || return
    if ((SECONDS - begun + 10 > budget)); then
        echo "$name: skipped, no time left" | tee -a "$table"
        return
    fi
    echo "=== $name: $*"
    timeout -k 5 "$limit" "$@" >"$raw/$name.log" 2>&1
    rc=$?
    # Tests that find no GPU are skipped, all of them, and pytest is content.
    [[ $rc != 0 || $* != *'-m pytest'* ]] || grep -q ' passed' "$raw/$name.log" || rc=5
    tail -n 40 "$raw/$name.log"
    line=$(grep -aE 'WINDOW|IPC |OVERHEAD|ORDER|KERNEL|ERROR SUMMARY|accuracy|passed|failed|skipped|error:' \
        "$raw/$name.log" | tail -n 1 | cut -c 1-200)
    [ "$rc" != 124 ] || line="over its limit of $limit s; $line"
    echo "$name: exit $rc, $((SECONDS - started)) s | $line" | tee -a "$table"
}

# What is here. Hydra needs a host name that resolves.
getent hosts "$(hostname)" >/dev/null || echo "127.0.0.1 $(hostname)" >>/etc/hosts
{
    date -u
    nvidia-smi -L
    nvidia-smi --query-gpu=driver_version,compute_mode,mig.mode.current,memory.total --format=csv
    "$python" -V
    uname -r
    nproc
    free -g | sed -n 2p
    df -h /dev/shm | tail -n 1
    ulimit -l
    which g++ cmake nvcc compute-sanitizer
    ldconfig -p | grep -E 'libcuda.so|libnvidia-ml'
    cat /proc/sys/kernel/yama/ptrace_scope
    git log --oneline -1
} 2>&1 | tee "$out/machine.txt"

# Not `pip install --target`: it drops the data of a wheel, and with them libmpi.so.
if [ -d .carry ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --ignore-installed \
        --prefix "$site" .carry/*.whl || exit 2
    for archive in .carry/*.tgz; do tar xzf "$archive" -C /tmp; done
    # Where a distribution's own pip puts them differs.
    packages=$(find "$site" -type d \( -name site-packages -o -name dist-packages \) | head -n 1)
    library=$(find "$site" -name libmpi.so.12 | head -n 1)
    commands=$(dirname "$(find "$site" -name mpiexec | head -n 1)")
    export PYTHONPATH="$PWD:$packages" PATH="$commands:$PATH" MPI4PY_LIBMPI="$library"
else
    export PYTHONPATH="$PWD"
fi
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 UCX_LOG_LEVEL=error CUPY_CACHE_DIR=/tmp/cupy
"$python" -c 'import ctypes; ctypes.CDLL("mpi_dasgd/kernels/_native.so").mpd_release' 2>/dev/null ||
    "$python" setup.py -q build_ext --inplace || echo "no native library" | tee -a "$out/machine.txt"
"$python" - <<'EOF' 2>&1 | tee -a "$out/machine.txt"
import importlib.metadata as m
names = "torch cupy-cuda13x cupy-cuda12x numpy mpi4py mpich h5py pydantic torchvision transformers"
for name in names.split():
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        pass
EOF
libcuda=$(ldconfig -p | sed -n 's/.*libcuda.so.1 .*=> //p' | head -n 1)
[ -n "$libcuda" ] || libcuda=$("$python" -c "
import torch
torch.cuda.init()
print(next(line.split()[-1] for line in open('/proc/self/maps') if 'libcuda.so' in line))")

dasgd() { echo "$python" -m mpi_dasgd "$@"; }
ranks() { # ranks N MEMORY: a job of N ranks that share the GPU
    dasgd launch -n "$1" --timeout 100 train jobs/gpu.toml "run.directory=$raw" \
        "run.name=$2-$1" device.share=true "transport.memory=$2"
}
pytest="$python -m pytest -q -p no:cacheprovider"
gpu_tests=$(grep -l 'mark\.gpu' -r tests --include='test_*.py')
intel=/tmp/impi_min

# A kernels, B order and training, C windows on device memory (Intel's MPI, which takes it; MPICH
# over a UCX that does), D what an exchange costs a step, E the baseline over gloo.
step A1-bits 120 $pytest -m gpu -k "not large" $gpu_tests
step B0-ipc 40 "$python" -m mpi_dasgd.device.ipc_probe --kill-owner --timeout 35
step B1-order 60 $(dasgd bench gpu order --out "$raw")
step B2-ipc-2 45 $(ranks 2 ipc)
may D2-gpt2 60 $(dasgd bench gpu overhead --model gpt2 --seconds 15 --out "$raw")
may A4-bandwidth 60 $(dasgd bench kernel --backend cuda --sizes 25M 100M --bits 8 --out "$raw")
may C1-intel 40 env I_MPI_ROOT=$intel LD_LIBRARY_PATH="$intel/lib:$LD_LIBRARY_PATH" \
    MPI4PY_LIBMPI=$intel/lib/libmpi.so.12 I_MPI_OFFLOAD=1 I_MPI_OFFLOAD_MODE=cuda \
    I_MPI_OFFLOAD_CUDA_LIBRARY="$libcuda" \
    $intel/bin/mpiexec.hydra -n 2 "$python" -m mpi_dasgd.doctor.windows cuda 64
may D1-resnet50 60 $(dasgd bench gpu overhead --model resnet50 --seconds 15 --out "$raw")
step B4-host-2 45 $(ranks 2 host)
may C2-mpich-ucx 40 env LD_LIBRARY_PATH="/tmp/ucx_min/lib:$LD_LIBRARY_PATH" MPIR_CVAR_NOLOCAL=1 \
    UCX_TLS=cuda_copy,cuda_ipc,sm,self,tcp \
    mpiexec -n 2 "$python" -m mpi_dasgd.doctor.windows cuda 64
step B3-ipc-4 60 $(ranks 4 ipc)
may A3-memcheck 60 compute-sanitizer --error-exitcode 9 \
    $pytest -m gpu -k "same_bits and 8-dither" tests/kernels/test_cuda.py
step A2-large 45 $pytest -m gpu -k large $gpu_tests
may F1-doctor 40 $(dasgd doctor)
may E1-ddp 60 $(dasgd bench training --quick --device cuda --tasks T3 --stragglers none \
    --algorithms alone,adpsgd,ddp --out "$raw")
exit $failed
