"""Serving: many requests on one loaded model, over HTTP."""
