"""What holds for all tests."""
import torch

# The files that take longest, longest first. Begun first, they are not what one process is still busy with when the other has nothing left.
LONGEST = ("test_resume", "test_seed_examples", "test_experiment", "test_cli", "test_demo", "test_regrowth", "test_processes", "test_every_kind_of_model", "test_zoo", "test_attention_kernel",
           "test_surgery", "test_benchmarks", "test_cells", "test_checkpoints", "test_storage", "test_scoring_benchmark", "test_dashboard", "test_doors", "test_import", "test_main_job")


def pytest_configure(config):
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
