# Analyze attention patterns
attention_data = NeuralPlasticity.analyze_attention_patterns(
    model=model,
    input_ids=input_ids,
    attention_mask=attention_mask
)

# Extract data
attention_tensors = attention_data['attention_tensors']
entropy_values = attention_data['entropy_values']
