package enrol

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"testing"

	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// Whatever a machine sends to enrol or to renew, what is refused is refused by name, and what is signed is for a host of the
// token's own pool, under a name that can be one.
func FuzzEnroll(f *testing.F) {
	poolToken, hostToken := fixedToken("machines", "-"), fixedToken("linux", "linux-1")
	for _, r := range []brokerapi.EnrollRequest{
		{Token: poolToken, Host: "new-1", ClientCSR: clientCSR(f, "machines", "new-1")},
		{Token: hostToken, Host: "linux-1", ClientCSR: clientCSR(f, "linux", "linux-1")},
		{Token: hostToken, Host: "other", ClientCSR: clientCSR(f, "linux", "other")},
		{Token: poolToken, Host: "taken", ClientCSR: clientCSR(f, "machines", "taken")},
		{Token: poolToken, Host: "../x", RDPCSR: "x"},
	} {
		data, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var req brokerapi.EnrollRequest
		if json.Unmarshal(data, &req) != nil {
			return
		}
		fix := setUp(t)
		fix.world.Edit(func(s *model.Snapshot) {
			s.Pools["machines"].Registration.TokenHash, s.Hosts["linux-1"].Registration.TokenHash = tokenHash(poolToken), tokenHash(hostToken)
		})
		res, err := fix.Enroll(t.Context(), req)
		var r *refusal.Error
		switch {
		case err != nil && (!errors.As(err, &r) || r.Code == refusal.Internal):
			t.Fatalf("refused by no name: %v", err)
		case err != nil:
			if len(r.Message) > 8<<10 {
				t.Fatalf("a refusal of %d bytes", len(r.Message))
			}
		case req.Token != poolToken && req.Token != hostToken:
			t.Fatalf("enrolled with %q", req.Token)
		case res.Host != req.Host || len(res.Host) > maxHostName || res.ClientCertificate == "" || res.Pool != map[bool]string{true: "machines", false: "linux"}[req.Token == poolToken]:
			t.Fatalf("enrolled: %+v", res)
		default:
			if h := fix.world.Snapshot().Hosts[res.Host]; h == nil || h.Enrolment.Key == "" || h.AssignedUser != "" || h.Pool != res.Pool {
				t.Fatalf("recorded: %+v", h)
			}
		}
		if _, err := fix.Renew(t.Context(), linux1, brokerapi.RenewRequest{ClientCSR: req.ClientCSR, RDPCSR: req.RDPCSR}); err == nil {
			t.Fatal("renewed a moment after it enrolled, or without having enrolled")
		}
	})
}

// fixedToken is the same in each process: a fuzzer's inputs come from another one.
func fixedToken(pool, host string) string {
	return "rdvreg." + ns + "." + pool + "." + host + "." + base64.RawURLEncoding.EncodeToString(make([]byte, secretLength))
}

func tokenHash(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}
