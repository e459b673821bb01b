"""The lean runtime: numpy and ONNX Runtime, never torch or triton."""
