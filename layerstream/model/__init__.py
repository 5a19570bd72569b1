"""What a model is divided into: components, as adapters describe them, and units. **New models: `adapters/`.**"""
