"""Updates of rows that travel through Kafka: what publishes and what applies them."""
