"""Many runs, made: a study's arms and budgets expanded into trials, searched, run, resumed."""
