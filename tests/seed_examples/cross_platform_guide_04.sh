# Method 1: Run with fixes and safety measures
python scripts/run_neural_plasticity_notebook_e2e.py

# Method 2: Fix dataset imports first
python scripts/fix_neural_plasticity_datasets.py
# Then open and run the fixed notebook in JupyterLab
jupyter lab notebooks/NeuralPlasticityDemo_datasets_fixed.ipynb
