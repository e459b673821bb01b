"""From torch to a bundle: ONNX graphs, parity checks, the bundle writer."""
