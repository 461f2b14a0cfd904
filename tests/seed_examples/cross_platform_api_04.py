from utils.neural_plasticity import (
    calculate_head_gradients,
    generate_pruning_mask,
    apply_pruning_mask,
    PruningStrategy
)

# Calculate gradients
grad_norms = calculate_head_gradients(
    model=model,
    dataloader=train_dataloader,
    num_batches=2,
    device=device
)

# Generate pruning mask
pruning_mask = generate_pruning_mask(
    grad_norm_values=grad_norms,
    entropy_values=entropy_values[0],
    prune_percent=0.2,
    strategy=PruningStrategy.COMBINED
)

# Apply pruning
pruned_heads = apply_pruning_mask(
    model=model,
    pruning_mask=pruning_mask,
    mode="zero_weights"
)
