"""What a run leaves for people to look at: Weights & Biases tables, plots and the offline HTML report.

Nothing is imported here: the report must work on a machine where W&B, torch and Lightning are broken or absent,
which is when a failed run is read. Import ``write_report`` from ``lmlab.tracking.report``.
"""
