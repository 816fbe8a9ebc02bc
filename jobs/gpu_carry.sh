#!/bin/bash
# Fills .carry/ with the packages that a GPU machine without a package index may lack: `make gpu-carry`.
#
#     jobs/gpu_carry.sh [PYTHON_VERSION]      # of that machine: 3.12
#
# Wheels of what mpi_dasgd needs beside torch, CuPy and NumPy, and two archives with MPI libraries
# that can be CUDA-aware: Intel MPI, and UCX with CUDA for MPICH. 36 MB. Needs pip and an index.
set -e
version=${1:-3.12}
cd "$(dirname "$0")/.."
rm -rf .carry && mkdir .carry
archives=$(mktemp -d)
trap 'rm -rf "$archives"' EXIT

platforms=$(for n in 1 2010 2014 _2_17 _2_24 _2_27 _2_28 _2_31 _2_34 _2_35; do
    echo "--platform manylinux${n}_x86_64"
done)
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp $platforms -d .carry -c constraints.txt \
    mpich mpi4py pydantic pydantic-core typing-extensions typing-inspection annotated-types \
    h5netcdf greenlet
python3 -m pip download -q --no-deps -d "$archives" impi-rt==2021.18.0 libucx-cu13==1.22.0

# Only what starts ranks: of 200 MB, 29 and 18.
cd "$archives"
for wheel in *.whl; do python3 -m zipfile -e "$wheel" .; done
intel=$(echo impi_rt-*.data/data)
mkdir -p impi_min/bin impi_min/lib ucx_min/lib/ucx ucx_min/libucx_cu13.libs
cp "$intel"/bin/{mpiexec.hydra,hydra_bstrap_proxy,hydra_pmi_proxy} impi_min/bin
chmod +x impi_min/bin/*
cp "$intel"/lib/{libmpi.so.12,libfabric.so.1,libtcp-fi.so,libshm-fi.so,librxm-fi.so} impi_min/lib
cp libucx/lib/lib{ucm,ucp,ucs,ucs_signal,uct}.so.0 ucx_min/lib
cp libucx/lib/ucx/lib{ucm_cuda,uct_cma,uct_cuda}.so.0 ucx_min/lib/ucx
cp libucx_cu13.libs/libcudart* ucx_min/libucx_cu13.libs
tar czf "$OLDPWD/.carry/impi_min.tgz" impi_min
tar czf "$OLDPWD/.carry/ucx_min.tgz" ucx_min
du -sh "$OLDPWD/.carry"
