"""stub"""
def evaluate(model: str, tasks: str = ""):
    """Evaluate."""
def generate(model: str, prompt: str = ""):
    """Generate."""
