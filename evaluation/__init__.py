"""Floor 5: measuring. Control fidelity, picture metrics, costs, the protocol of `evaluate.py`, its
tables, plots of logs. Nothing here trains; of a training run only its log is read."""
