results = NeuralPlasticity.run_pruning_cycle(
    model=model,
    train_dataloader=train_dataloader,
    eval_dataloader=eval_dataloader,
    pruning_level=0.2,
    strategy=PruningStrategy.COMBINED,
    learning_rate=5e-5,
    training_steps=200
)
