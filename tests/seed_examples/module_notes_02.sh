# Test only the tensor handling
python scripts/test_tensor_handling.py
