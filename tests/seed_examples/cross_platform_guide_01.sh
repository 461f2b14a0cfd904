# Activate the existing virtual environment
source .venv/bin/activate  # On Linux/Mac
.venv\Scripts\activate     # On Windows
