"""Read the results of a run: by the package's loader, and by xarray without the package.

python examples/read_results.py runs/quickstart
"""

import sys
from pathlib import Path

import xarray as xr

from mpi_dasgd.analysis import load_run

directory = Path(sys.argv[1])
run = load_run(directory)  # also a run that is live or was killed
figures = run.summary()
print(f"{run.name}: {figures['algorithm']}, {figures['ranks']} ranks, {figures['status']}")
ages = run.ages()  # in steps; negative where the partner was ahead
print(f"staleness: {ages.clip(min=0).mean():.2f} steps in the mean, {ages.max()} at most")
print(f"bytes per exchange: {figures['bytes_per_exchange']:.0f}")

# One variable per column, of shape (rank, record), NaN after a rank's last record.
with xr.open_dataset(directory / "results.h5", engine="h5netcdf", group="exchange") as exchange:
    megabytes = exchange["bytes"].sum("record") / 1e6
    print("MB moved by each rank:", *megabytes.values.round(3))
with xr.open_dataset(directory / "results.h5", engine="h5netcdf", group="consensus") as consensus:
    distance = consensus["consensus_distance"]
    print(f"{distance.attrs['long_name']}:", *distance.values.round(4))
