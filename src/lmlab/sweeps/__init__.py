"""Many runs: the sweeper that Hydra's -m goes through, and the launcher that gives each job fresh processes."""
