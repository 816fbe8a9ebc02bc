"""Where the tests of a module are: ``tests/a/test_b.py`` for ``a/b.py``, or as said here."""

from __future__ import annotations

from pathlib import Path

from tests.support.mpi_ranks import ROOT

PACKAGE, TESTS = ROOT / "mpi_dasgd", ROOT / "tests"

TESTED_BY = {
    "algorithms/test_adpsgd": "algorithms: adpsgd_bipartite adpsgd_pull neighbour_exchange "
    "pull_averaging",
    "algorithms/test_asgd": "algorithms: gradient_server minibatch server work_queue "
    "/ staleness: delay_meter",
    "algorithms/test_catalogue": "algorithms: description",
    "algorithms/test_dasgd": "algorithms: replica / codecs: error_feedback "
    "/ staleness: version_vectors / analysis: version_history",
    "algorithms/test_build": "algorithms: validation",
    "algorithms/test_conservation": "algorithms: communication",
    "algorithms/test_registration": "algorithms: base no_communication",
    "algorithms/test_swarm": "algorithms: local_phase swarm_blocking swarm_pull",
    "algorithms/test_synchronous_and_push_sum": "algorithms: allreduce dpsgd local_sgd osgp "
    "push_sum sgp",
    "analysis/test_report": "analysis: load page page_template panels plots run style "
    "table verdict",
    "device/test_cuda": "device: cuda_calls cuda_events cuda_memory",
    "device/test_ipc_probe": "device: ipc_probe_child probe_process",
    "device/test_host": "device: base",
    "bench/test_kernel": "bench: cpu_timer gpu_timer kernel_models kernel_report "
    "kernel_workload machine timed_operation",
    "bench/test_gpu_order": "bench: gpu",
    "bench/test_gpu_overhead": "bench: gpu_models loopback",
    "bench/test_quality": "bench: bias codec_error detection gossip gossip_gradients",
    "bench/test_rma": "bench: rma_operations",
    "bench/test_step": "bench: meeting_point step_arms step_job step_picture step_plan step_rank "
    "step_report",
    "bench/test_training": "bench: ddp gpu_device job_series measured_rank measurement "
    "training_plan training_report",
    "codecs/test_device_codecs": "codecs: device_elementwise device_lattice device_scale "
    "late_totals",
    "codecs/test_exchange": "codecs: base bucket_scale elementwise lattice native_state none",
    "config/test_declared_once": "config: schema",
    "doctor/test_doctor": "doctor: bandwidth check contention environment latency mpi_progress "
    "network_checks probe timing",
    "kernels/test_cuda_optimizer": "kernels: table",
    "kernels/test_lattice": "kernels: encoded reference",
    "kernels/test_optimizer": "kernels: optimizer_native optimizer_reference optimizer_step",
    "launch/test_job": "launch: rank_status supervisor",
    "simulation/test_simulator": "simulation: drain local_optimizer metrics / tasks: convex",
    "integrations/test_huggingface": "integrations: collectives session",
    "jobs/test_jobs": "simulation: recorded_times trace",
    "storage/test_checkpoint": "storage: atomic_file checkpoint_files restore writer_thread",
    "storage/test_results": "storage: model schema",
    "storage/test_runfile": "storage: provenance",
    "studies/test_studies": "studies: adaptive dataset delay disagreement heterogeneous "
    "linear_theory plotting quantization slowdown speedup staleness trajectory",
    "tasks/test_tasks": "tasks: data idx models tables",
    "topology/test_topology": "topology: graphs spanning_tree spectrum",
    "test_process_end": ": messages",
    "training/test_attach": "training: optimizer_attachment",
    "training/test_step_hooks": "training: closure",
    "training/test_fused_optimizer": "training: optimizer_groups",
    "training/test_budget": "training: learning_rate",
    "model/test_parameter_attachment": "model: parameter_ties",
    "training/test_join": "training: shadow_optimizer step_refusals",
    "training/test_train": ": __main__ cli errors / training: decentralized "
    "trainer / storage: run_directory",
    "training/test_waiter_and_shutdown": "training: shutdown stall waiter",
    "transport/test_failures": "transport: peer_views progress_context progress_engine "
    "remote_peers teardown",
    "transport/test_publication_inbox": "transport: counters inbox publication memory",
    "transport/test_endpoint": "transport: allreduce clock network",
    "transport/test_native_protocol": "transport: native_inbox native_publication native_rank",
    "transport/test_membership": "transport: activity",
    "transport/test_stress": "transport: payload_slots shared_memory windows",
}
"""Modules without a test file of their own name: by test file, package by package."""


def _modules() -> set[tuple[str, str]]:
    """Package and name of each module; those of transport's parts count as transport's."""
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")} - {Path("__init__.py")}
    return {(_package(file), file.stem) for file in files if file.stem != "__init__"}


def _package(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else ""


def _table() -> list[tuple[str, str]]:
    rows = []
    for part in " / ".join(TESTED_BY.values()).split(" / "):
        package, _, names = part.partition(":")
        rows += [(package.strip(), name) for name in names.split()]
    return rows


def test_every_module_has_a_test_file_of_its_name_or_stands_in_the_table() -> None:
    own = {(package, name) for package, name in _modules() if _file(package, name).exists()}
    table = _table()
    assert len(table) == len(set(table)), "a module stands in the table twice"
    assert sorted(_modules() - own - set(table)) == [], "neither a test file nor a row of the table"
    assert sorted(set(table) & own) == [], "in the table, and has a test file of its name"
    assert sorted(set(table) - _modules()) == [], "in the table, and is no module"


def _file(package: str, name: str) -> Path:
    return TESTS / package / f"test_{name}.py"


def test_the_table_names_test_files() -> None:
    assert [name for name in TESTED_BY if not (TESTS / f"{name}.py").exists()] == []


def test_each_folder_of_tests_has_a_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")} - {Path()}
    others = {Path("jobs")}  # of the repository
    assert [str(f) for f in folders - others if not (PACKAGE / f / "__init__.py").exists()] == []
