# Direct function imports
from utils.neural_plasticity import (
    calculate_head_entropy,
    calculate_head_gradients,
    generate_pruning_mask,
    apply_pruning_mask
)

# High-level class
from utils.neural_plasticity import NeuralPlasticity
