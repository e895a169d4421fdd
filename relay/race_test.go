//go:build race

package relay

// The race detector allocates, and has pools forget on purpose.
const raceEnabled = true
