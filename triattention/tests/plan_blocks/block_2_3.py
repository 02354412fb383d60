print("All imports: PASSED")
