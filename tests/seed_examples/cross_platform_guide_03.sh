# Option 1: Fix dataset imports only
python scripts/fix_neural_plasticity_datasets.py

# Option 2: Fix all issues (imports, Apple Silicon compatibility, etc.)
python scripts/fix_neural_plasticity_imports.py

# Option 3: Fix and execute the notebook end-to-end
python scripts/run_neural_plasticity_notebook_e2e.py
