"""Running networks on packed activations: capture -> Graph -> passes -> Plan -> native engine."""
