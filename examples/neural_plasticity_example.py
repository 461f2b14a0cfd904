"""A complete cycle in one script: measure, prune, recover, and look at it.

    python examples/neural_plasticity_example.py
    python examples/neural_plasticity_example.py --model distilgpt2 --dataset wikitext --dataset-config wikitext-2-raw-v1

The first line needs no network: model and texts come with the package. The figures land in a folder of their own under
--output-dir, beside the record of the run.
"""

import argparse

from neural_plasticity import setup
from neural_plasticity.experiment import ExperimentConfig, comparison_table, run_experiment
from neural_plasticity.pruning import PruningStrategy


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:gpt2", help="embedded:gpt2, embedded:llama, a local folder, or an id on the hub")
    parser.add_argument("--dataset", default="embedded", help="embedded, a .txt file, a folder, or an id on the hub")
    parser.add_argument("--dataset-config", help="for datasets that have several")
    parser.add_argument("--prune-level", type=float, default=0.2, help="share of the heads (default: 0.2)")
    parser.add_argument("--strategy", default="gradient", help=f"one of {', '.join(PruningStrategy)} (default: gradient)")
    parser.add_argument("--training-steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", default="neural-plasticity-runs")
    parser.add_argument("--minimal", action="store_true", help="a run of seconds, to see that everything works")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    setup()
    result = run_experiment(ExperimentConfig(
        model_name=arguments.model, dataset_name=arguments.dataset, dataset_config=arguments.dataset_config, prune_level=arguments.prune_level,
        strategy=arguments.strategy, training_steps=arguments.training_steps, seed=arguments.seed, output_dir=arguments.output_dir,
        minimal=arguments.minimal,
    ))
    print(comparison_table(result))
    print(result.removal)
    print(f"record, figures and model: {result.folder}")


if __name__ == "__main__":
    main()
