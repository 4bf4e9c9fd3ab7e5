"""What a budget does to answers: tasks, runs that can be resumed, results, and the report made of them.

Modules are imported where they are needed: `decode` and `model` load the native library, the others don't.
"""
