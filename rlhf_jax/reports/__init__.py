"""Reports on a run: tables, figures, the HTML report, and `Run` for notebooks."""
