# Activate virtual environment
source .venv/bin/activate

# Set optimized environment variables
export OMP_NUM_THREADS=1
export OPENBLAS_NUM_THREADS=1
export MKL_NUM_THREADS=1
export NUMEXPR_NUM_THREADS=1

# Run with minimal settings for testing
python scripts/run_neural_plasticity_notebook.py --minimal
