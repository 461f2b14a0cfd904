# Automatically install all required dependencies
python scripts/install_neural_plasticity_deps.py
