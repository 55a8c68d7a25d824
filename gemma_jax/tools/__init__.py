"""Function calling: tools as schemas, the prompts that offer them, the calls that models write, and running these."""
