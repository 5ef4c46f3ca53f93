"""Outcomes as tables, pages, pictures, JSON and MLflow runs."""
