"""A trained model used by a person: prompts from files (`prompts`, `writing`), a conversation (`dialogue`) in the terminal
(`terminal`) or on a page in the browser (`page`).
"""
