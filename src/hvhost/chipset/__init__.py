"""What is not VMBus: UART, RTC, ACPI tables and power management, reset."""
