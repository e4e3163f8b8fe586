"""What this project runs on a GPU whenever one is at hand: `scripts/gpu_acceptance.sh OUT`.

It lies with the tests and not in a package that ships: it runs the tests, needs their models and their doubles, and a user has
`selftest`. `pack` gathers what a bare machine lacks, `rehearse` tries all of it where there is no GPU, `python -m tests.gpu` runs
the parts (`parts`) one by one (`running`); `whole_model`, `rules`, `against_cpu` and `one_rank` are parts of their own.
"""
