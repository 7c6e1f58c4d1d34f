"""The arithmetic of the methods: pure tensors, no model, no engine, no method."""
