"""The command ``mpi-dasgd``. MPI and torch are loaded by what needs them, and not before."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mpi_dasgd import __version__
from mpi_dasgd.errors import MpiDasgdError, UserError
from mpi_dasgd.messages import log_to_stderr, print_message
from mpi_dasgd.world import expected_ranks

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 3 for a run that diverged, 4
    for a run that lost a rank it needs."""
    options = _parser().parse_args(arguments)
    log_to_stderr()
    try:
        return int(options.command(options))
    except MpiDasgdError as error:
        if expected_ranks()[1] == 0:
            print_message(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="mpi-dasgd",
        description="Decentralized, asynchronous SGD for PyTorch over MPI windows.",
    )
    parser.add_argument("--version", action="version", version=f"mpi-dasgd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train", help="train; start it with `mpi-dasgd launch`, mpirun, mpiexec or srun"
    )
    _add_configuration(train)
    train.add_argument(
        "--print-config",
        action="store_true",
        help="show every key with value and meaning, and stop",
    )
    train.set_defaults(command=_train)

    launch = commands.add_parser(
        "launch", help="run a command on several ranks of this machine, or of --hosts"
    )
    launch.add_argument("-n", "--ranks", type=int, required=True, help="number of ranks")
    launch.add_argument("--hosts", help="host:ranks,host:ranks")
    launch.add_argument("--agent", help="program that reaches a host, instead of ssh")
    launch.add_argument("--timeout", type=float, help="seconds after which the job is ended")
    launch.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="COMMAND", help="train, doctor ..."
    )
    launch.set_defaults(command=_launch)

    simulate = commands.add_parser("simulate", help="run the algorithms on virtual ranks")
    _add_configuration(simulate)
    simulate.add_argument("--json", action="store_true", help="print one JSON object")
    simulate.set_defaults(command=_simulate)

    report = commands.add_parser("report", help="table, PNG and HTML page of one or several runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directory or results.h5")
    report.add_argument("--out", help="directory for report.png and report.html [the first run's]")
    report.add_argument(
        "--json", action="store_true", help="print the figures as JSON, draw nothing"
    )
    report.set_defaults(command=_report)

    doctor = commands.add_parser(
        "doctor", help="say whether training would work here, and how fast"
    )
    doctor.add_argument("-n", "--ranks", type=int, default=2, help="ranks to probe with [2]")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(command=_doctor)

    bench = commands.add_parser("bench", help="measure against a baseline in one run")
    bench.add_argument("name", help="gpu, kernel, quality, rma, step or training")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="see `mpi-dasgd bench NAME --help`")
    bench.set_defaults(command=_bench)

    algorithms = commands.add_parser(
        "algorithms", help="list the algorithms: paper, what is exchanged, bytes, memory, waiting"
    )
    form = algorithms.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print the table of the README")
    algorithms.add_argument(
        "--parameters", type=int, help="also give bytes, for this number of parameters"
    )
    algorithms.add_argument("-n", "--ranks", type=int, default=16, help="for bytes: ranks [16]")
    algorithms.add_argument(
        "--codec", default="auto", help="for bytes: codec, where it can be used"
    )
    algorithms.add_argument("--local-steps", type=int, default=1, help="for bytes: H [1]")
    algorithms.add_argument(
        "--degree", type=int, help="for bytes: neighbours of a rank [ranks - 1]"
    )
    algorithms.set_defaults(command=_algorithms)

    study = commands.add_parser(
        "study", help="the curves of the papers on the virtual clock: samples in HDF5, and a plot"
    )
    study.add_argument("name", nargs="?", metavar="NAME", help="one of those listed without it")
    study.add_argument("--out", metavar="DIR", help="directory for NAME.h5 and NAME.png")
    study.add_argument("--quick", action="store_true", help="small: seconds instead of minutes")
    study.add_argument("--seeds", type=int, help="number of seeds [the study's own]")
    study.add_argument(
        "--from", dest="source", metavar="FILE", help="draw an earlier NAME.h5, measure nothing"
    )
    study.add_argument("--samples", dest="source", help=argparse.SUPPRESS)  # its old name
    study.add_argument("--json", action="store_true", help="print one JSON object")
    study.set_defaults(command=_study)
    return parser


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", help="configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as in optimizer.lr=0.05; later ones win"
    )


def _train(options: argparse.Namespace) -> int:
    from mpi_dasgd import config

    if options.print_config:
        if expected_ranks()[1] != 0:
            return 0
        print("\n".join(config.describe(config.load(options.config, options.overrides))))
        return 0
    refused: UserError | None = None
    try:
        configuration = config.load(options.config, options.overrides)
    except UserError as error:
        if expected_ranks()[0] == 1:
            raise
        refused = error  # perhaps on this rank alone: the others must hear of it
    from mpi_dasgd import launch, world
    from mpi_dasgd.device import binding

    launch.enable_stack_dump()
    binding.bind_before_mpi()
    environment = world.start()
    environment.abort_on_exception()

    def train() -> int:
        with environment.collective_errors():
            if refused is not None:
                raise refused
        from mpi_dasgd.training import trainer

        return trainer.train(configuration, environment)

    return environment.run(train)


def _launch(options: argparse.Namespace) -> int:
    from mpi_dasgd import launch

    if not options.rest:
        raise UserError(
            "launch: expected a command, as in `mpi-dasgd launch -n 4 train jobs/train.toml`"
        )
    return launch.launch(
        options.ranks,
        options.rest,
        hosts=options.hosts,
        agent=options.agent,
        timeout=options.timeout,
        env={"MPI_DASGD_TERMINAL": "1" if sys.stdout.isatty() else "0"},
    )


def _simulate(options: argparse.Namespace) -> int:
    from mpi_dasgd import config
    from mpi_dasgd.simulation.simulator import simulate

    metrics = simulate(config.load(options.config, options.overrides))
    if options.json:
        print(json.dumps(metrics))
    else:
        for name, value in metrics.items():
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            print(f"{name:<22}{text}")
    return 0


def _report(options: argparse.Namespace) -> int:
    try:
        from mpi_dasgd.analysis.load import load_run
        from mpi_dasgd.analysis.page import write_report
        from mpi_dasgd.analysis.table import report_json, summary_table
    except ModuleNotFoundError as error:
        raise UserError(
            f"report needs the package {error.name!r}: pip install 'mpi_dasgd[report]'"
        ) from error
    runs = [load_run(path) for path in options.runs]
    if options.json:
        print(json.dumps(report_json(runs)))
        return 0
    print(summary_table(runs))
    picture, page = write_report(
        runs, Path(options.out) if options.out else _run_directory(options.runs[0])
    )
    print(f"picture: {picture}\npage:    {page}")
    return 0


def _run_directory(run: str) -> Path:
    path = Path(run)
    return path if path.is_dir() else path.parent


def _doctor(options: argparse.Namespace) -> int:
    from mpi_dasgd import doctor

    return doctor.run(options.ranks, as_json=options.json)


def _bench(options: argparse.Namespace) -> int:
    from mpi_dasgd import bench

    return bench.run(options.name, options.rest)


def _algorithms(options: argparse.Namespace) -> int:
    from mpi_dasgd.algorithms import catalogue

    if options.markdown:
        print("\n".join(catalogue.markdown()))
        return 0
    sizes = None
    if options.parameters is not None:
        sizes = catalogue.Sizes(
            options.parameters, options.ranks, options.codec, options.local_steps, options.degree
        )
    if options.json:
        print(json.dumps({"symbols": catalogue.SYMBOLS, "algorithms": catalogue.rows(sizes)}))
    else:
        print("\n".join(catalogue.text(sizes)))
    return 0


def _study(options: argparse.Namespace) -> int:
    from mpi_dasgd import studies

    if options.name is None:
        print("\n".join(f"{name:<15}{question}" for name, question in studies.STUDIES.items()))
        return 0
    return studies.run(
        options.name, options.out, options.quick, options.seeds, options.json, options.source
    )
