"""What is mutated, and which tests must notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Module:
    """Source files that belong together, and the quick tests that hold them, as pytest takes them."""

    name: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]


MODULES = (
    Module(
        "routing",
        ("moee/layers/routing.py", "moee/layers/routed.py"),
        ("tests/moee/test_routing.py", "tests/moee/test_ops.py", "tests/moee/test_autocast.py",
         "--deselect=tests/moee/test_ops.py::test_opcheck_covers_schema_fake_and_autograd"),
    ),
    Module(
        "refit",
        ("moee/calibrate/refit.py", "moee/calibrate/ridge.py", "moee/calibrate/layer_sums.py"),
        ("tests/moee/test_refit_ridge.py", "tests/moee/test_thread_ranks.py", "tests/moee/test_stream.py",
         *(f"tests/moee/test_hierarchical.py::test_{name}" for name in (
             "a_model_of_equal_layers_takes_its_images_in_one_go",
             "without_an_entry_the_layers_get_what_fits_and_the_report_says_so",
             "layers_that_share_what_goes_past_them_get_a_pass_each", "memory_bounds_the_images_whose_inputs_are_kept",
         ))),
    ),
    Module(
        "selection",
        ("moee/calibrate/selection.py", "moee/calibrate/elimination.py", "moee/methods/neurons/allocation.py"),
        ("tests/moee/test_selection.py", "tests/moee/test_elimination.py", "tests/moee/test_thread_ranks.py",
         "tests/moee/test_allocation.py"),
    ),
    Module(
        "loading",
        ("moee/weights/weights_file.py", "moee/weights/fitting.py", "moee/weights/prefixes.py",
         "moee/weights/difference.py", "moee/weights/loading.py"),
        ("tests/moee/test_fitting.py", "tests/moee/test_weights_file.py",
         "--deselect=tests/moee/test_weights_file.py::test_models_of_these_tests_have_no_two_equal_tensors"),
    ),
    Module(
        "gates",
        ("exporter/verification/result.py", "exporter/verification/accuracy.py", "exporter/parity/result.py",
         "exporter/parity/outputs.py", "exporter/parity/stats.py"),
        ("tests/exporter/test_gate_figures.py", "tests/exporter/test_gates.py", "tests/exporter/test_accuracy_shown.py",
         "--deselect=tests/exporter/test_gates.py::test_fail_if_slower_fails_where_nothing_could_be_told",
         "--deselect=tests/exporter/test_gates.py::test_a_random_head_has_no_accuracy_that_a_gate_could_be_held_against"),
    ),
)  # fmt: skip
