"""Measure attention heads of Hugging Face transformers exactly, prune them, remove them for real, and let them grow again.

Public names are loaded when they are first used, so that importing the package costs little and changes nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_ROOMS = {
    "errors": "PlasticityError InvalidArgument WrongType UnsupportedModel NotRemovable StorageError SourceUnavailable EnvironmentProblem",
    "environment": "setup platform_policy get_environment_info repair_datasets_import IS_APPLE_SILICON IS_COLAB HAS_GPU",
    "tensors": "safe_matmul safe_tensor_to_numpy",
    "data": "load_embedded_model load_embedded_text text_dataloader",
    "sources": "load_model load_texts",
    "examples": "example_inputs",
    "anatomy": "Anatomy",
    "probing": "probe detect_model_structure use_anatomy",
    "by_hand": "describe_site anatomy_by_hand",
    "gates": "gate_heads restore_heads revive_heads dormant_heads bank_on_disk",
    "streaming": "attention_statistics",
    "entropy": "attention_entropy calculate_head_entropy",
    "patterns": "measure_attention",
    "importance": "CRITERIA criterion criteria_within measure_heads measure_entropy analyze_attention_patterns calculate_head_gradients",
    "evaluation": "evaluate_model bits_per_byte measure_latency generate_sample model_cost",
    "compensation": "compensate_heads DenseInputs",
    "surgery": "remove_heads",
    "card": "model_card",
    "hub": "push_pruned",
    "storage": "save_pruned load_pruned",
    "export": "export_dense",
    "pruning": "PruningStrategy PruningMode generate_pruning_mask apply_pruning_mask choose_heads",
    "doors": "attention_of_text adapter_targets",
    "regrowth": "regrowth_scores PlasticitySchedule PlasticityMemory Change plasticity_step",
    "moments": "carrying",
    "training": "PlasticityTrainer PlasticityCallback get_plasticity_optimizer train_with_plasticity run_plasticity_loop",
    "visualization": "visualize_head_scores visualize_head_entropy visualize_head_gradients visualize_pruning_decisions "
    "visualize_training_metrics visualize_attention_patterns visualize_cycle_timeline",
    "report": "ComparisonTable read_record",
    "cells": "run_cells CellsFailed",
    "parameters": "refuse_unknown_parameters",
    "experiment": "ExperimentConfig prepare_experiment run_experiment resume_experiment comparison_table",
    "sweep": "run_sweep visualize_sweep",
    "dashboard": "Dashboard",
    "tracking": "track_lines",
    "widgets": "explore",
    "core": "NeuralPlasticity",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME})
