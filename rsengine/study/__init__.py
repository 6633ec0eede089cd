"""Studies: recipes that differ in what is compared, trained with paired seeds, and what their differences are worth."""
