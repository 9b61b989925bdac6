"""Studies: expand arms and budgets into trials, search hyper-parameters, run and resume."""
