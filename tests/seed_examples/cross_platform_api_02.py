from utils.neural_plasticity import NeuralPlasticity

# Get environment information
env_info = NeuralPlasticity.get_environment_info()
print(f"Platform: {env_info['platform']}")
print(f"Apple Silicon: {env_info['is_apple_silicon']}")
print(f"GPU Available: {env_info['has_gpu']}")
print(f"Device: {env_info['device']}")
