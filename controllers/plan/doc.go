// Package plan decides. Each function takes what is wanted and what was seen, and says what to do; it has no client, no
// context and no clock (the time is an argument), so that every decision stands in a table test.
package plan
