"""The small trained model that ships with the package, and text it has not seen."""
