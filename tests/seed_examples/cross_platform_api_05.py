from utils.neural_plasticity import (
    visualize_head_entropy,
    visualize_head_gradients,
    visualize_pruning_decisions
)

# Visualize entropy
entropy_fig = visualize_head_entropy(
    entropy_values=entropy_values,
    title="Attention Entropy Heatmap"
)

# Visualize gradients
grad_fig = visualize_head_gradients(
    grad_norm_values=grad_norms,
    title="Head Gradient Norms"
)

# Visualize pruning decisions
mask_fig = visualize_pruning_decisions(
    grad_norm_values=grad_norms,
    pruning_mask=pruning_mask,
    title="Pruning Decisions"
)
