"""The paper's experiments as data: what each runs (`catalogue`), the paper's numbers (`paper`), `cost`, table and picture."""
