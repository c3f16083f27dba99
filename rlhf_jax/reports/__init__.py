"""What a run looks like afterwards: tables, figures, the HTML report, and `Run` for notebooks."""
