"""The way from models to judged scores: the paper's tasks, answers by its methods, judges, metrics and tables."""
