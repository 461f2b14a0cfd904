# Fix and run the notebook
python scripts/run_neural_plasticity_notebook_e2e.py
