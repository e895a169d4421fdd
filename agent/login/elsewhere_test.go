package login

import "testing"

func TestElsewhere(t *testing.T) {
	for remote, want := range map[string]bool{
		"192.0.2.7": true, "2001:db8::1": true, "fe80::1%eth0": true,
		"127.0.0.1": false, "127.5.6.7": false, "::1": false, "::ffff:127.5.6.7": false, "0.0.0.0": false, "::": false,
		"": false, "localhost": false, "127.1": false, "0177.0.0.1": false, "UDS": false, " 192.0.2.7": false,
	} {
		if err := Elsewhere(remote); (err == nil) != want {
			t.Errorf("%q: %v", remote, err)
		}
	}
}
